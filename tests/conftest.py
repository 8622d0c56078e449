"""Fixtures that several rings share; each is explained where it is made."""

from rigs.databases import database, databases, migrated, postgres

__all__ = ["database", "databases", "migrated", "postgres"]
