"""What goes wrong with streams."""


class DamagedStream(ValueError):
    """Bytes that no encoder wrote for these tables and so many symbols."""
