"""The run-time checker behind `BEARTYPE=1`: annotated types and tensor shapes; an int is accepted as a float."""

from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))
