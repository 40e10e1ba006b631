"""Corpora that two chapters share."""
