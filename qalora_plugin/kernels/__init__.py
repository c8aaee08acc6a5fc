"""What makes it fast. Every function here is tested against ``quant/reference.py``, forward and backward."""
