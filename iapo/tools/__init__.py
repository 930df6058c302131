"""The commands that read what runs have written, and the generator of docs/methods.md."""
