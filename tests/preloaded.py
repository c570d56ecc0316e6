"""Imported last by the server that forks ranks: all of them run, and give the digest of, the sources that it has read."""

from exfm.trainer.facts import sources

sources()
