"""Serving: the engine and its parts on the host, from requests to tokens and text."""
