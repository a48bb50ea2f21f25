"""Objectives: small pure files that turn scored groups into weighted rows."""
