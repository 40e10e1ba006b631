"""Runs of chapters: notebooks as files, executed, stored, found again."""
