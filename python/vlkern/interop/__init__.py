"""Drop-in forms of this library's ops for other libraries. Each is an explicit class or call; nothing is patched."""
