"""Turn a result into what a person or a program reads; the only place where bytes become GiB."""
