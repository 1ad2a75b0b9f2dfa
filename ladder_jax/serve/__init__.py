"""The host side of serving: requests come in, their tokens come out."""
