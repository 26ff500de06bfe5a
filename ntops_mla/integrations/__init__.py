"""The library inside other projects, a file each."""
