"""Tables whose rows come and go with the ids that are seen; in one process, slice by slice."""
