"""The emoji picture set: built from npm packages (``build``); the copy in the package is read through ``unpack``."""
