"""The user's own loop: patches go in, in any order, and come out as one volume."""
