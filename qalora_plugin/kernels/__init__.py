"""What makes it fast. Every function here is tested against ``core/reference.py``, forward and backward."""
