"""Drop-in forms of this library's ops for other libraries, and the names in their checkpoints.

Each is an explicit class or call; nothing is patched, and importing these modules imports no other library.
"""
