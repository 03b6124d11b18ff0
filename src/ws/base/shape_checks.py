"""The run-time checker behind `BEARTYPE=1`: annotated types and tensor shapes; int passes where float is said."""

from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))
