"""Paired measurements of qcowfs against its peers; see __main__.py."""
