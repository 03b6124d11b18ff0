// Sorting of tables, values under the pointer, unfolding before printing. The page can be read without it.
const first = (text) => {
  const found = text.replace(/\u2212/g, "-").replace(/,(?=\d{3}\b)/g, "").match(/[-+]?\d+(\.\d+)?(e[-+]?\d+)?/i);
  return found ? parseFloat(found[0]) : NaN;
};
const startsWithNumber = (text) => /^[-+\u2212]?[\d.]/.test(text.trim());

for (const table of document.querySelectorAll(".wide > table")) {
  const body = table.tBodies[0], rows = [...body.rows];
  if (rows.length < 3) continue;
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    if (head.tagName !== "TH") return;
    const texts = rows.map((row) => row.cells[column].textContent);
    const isNumber = texts.filter(startsWithNumber).length > texts.length / 2;
    const value = (row) => (isNumber ? first(row.cells[column].textContent) : row.cells[column].textContent);
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const next = { none: "ascending", ascending: "descending", descending: "none" };
      const order = next[head.getAttribute("aria-sort") || "none"];
      heads.forEach((one) => one.removeAttribute("aria-sort"));
      if (order !== "none") head.setAttribute("aria-sort", order);
      const turn = order === "descending" ? -1 : 1;
      const before = (a, b) => {
        const x = value(a), y = value(b);
        if (!isNumber) return turn * x.localeCompare(y);
        if (isNaN(x) || isNaN(y)) return isNaN(x) - isNaN(y);
        return turn * (x - y);
      };
      body.append(...(order === "none" ? rows : [...rows].sort(before)));
    });
  });
}

const tip = document.createElement("div");
tip.className = "tip";
tip.hidden = true;
document.body.append(tip);
for (const chart of document.querySelectorAll("figure.chart svg")) {
  const points = [...chart.querySelectorAll("circle")].map((point) => {
    const title = point.querySelector("title"), text = title.textContent;
    title.remove();
    return { point, text };
  });
  if (!points.length) continue;
  let near = null;
  const leave = () => {
    if (near) near.point.classList.remove("near");
    near = null;
    tip.hidden = true;
  };
  chart.addEventListener("pointermove", (event) => {
    let best = null, least = 40 * 40;
    for (const one of points) {
      const box = one.point.getBoundingClientRect();
      const x = box.x + box.width / 2 - event.clientX, y = box.y + box.height / 2 - event.clientY;
      if (x * x + y * y < least) [best, least] = [one, x * x + y * y];
    }
    if (best !== near) {
      leave();
      if (best) best.point.classList.add("near");
      near = best;
    }
    if (!best) return;
    tip.textContent = best.text;
    tip.hidden = false;
    const left = Math.min(event.clientX + 14, document.documentElement.clientWidth - tip.offsetWidth - 8);
    tip.style.left = Math.max(8, left) + "px";
    tip.style.top = Math.max(8, event.clientY - tip.offsetHeight - 12) + "px";
  });
  chart.addEventListener("pointerleave", leave);
}

const folded = [];
addEventListener("beforeprint", () => {
  for (const one of document.querySelectorAll("details:not([open]):not(.values, .long)")) {
    folded.push(one);
    one.open = true;
  }
});
addEventListener("afterprint", () => folded.splice(0).forEach((one) => (one.open = false)));
