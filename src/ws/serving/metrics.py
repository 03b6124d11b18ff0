"""What a server has done, in the text format of Prometheus."""

from __future__ import annotations

from ws.serving.engine import Engine

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


def text(engine: Engine) -> str:
    """All metrics, one line each after its help and type."""
    counts = engine.counts
    lines: list[str] = []

    def tell(name: str, kind: str, told: str, *values: tuple[str, float]) -> None:
        lines.extend((f"# HELP ws_{name} {told}", f"# TYPE ws_{name} {kind}"))
        lines.extend(f"ws_{name}{labels} {value:.17g}" for labels, value in values)

    ended = [(f'{{finish="{finish}"}}', number) for finish, number in counts.requests.items()]
    tell("requests_total", "counter", "Requests that ended, by how.", *ended)
    tell("requests_active", "gauge", "Requests that are being answered.", ("", engine.active))
    tell("requests_waiting", "gauge", "Requests that wait for a row.", ("", engine.waiting))
    tell("prompt_tokens_total", "counter", "Tokens of prompts.", ("", counts.prompt_tokens))
    tell("prompt_tokens_reused_total", "counter", "Tokens of prompts whose states were reused.",
         ("", counts.reused_tokens))  # fmt: skip
    tell("written_tokens_total", "counter", "Tokens of answers.", ("", counts.written_tokens))
    tell("rounds_total", "counter", "Passes that gave every active request its next token.", ("", counts.rounds))
    tell("rows_total", "counter", "Rows of these passes; over rounds, the mean batch.", ("", counts.rows))
    tell("kept_bytes", "gauge", "Bytes of kept states of finished requests.", ("", engine.kept_bytes))
    tell("first_token_seconds", "summary", "Time from a request to its first token.",
         ("_sum", counts.first_token_seconds), ("_count", counts.first_tokens))  # fmt: skip
    return "\n".join(lines) + "\n"
