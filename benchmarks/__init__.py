"""Measurements; each module is a command, see ``make bench``."""
