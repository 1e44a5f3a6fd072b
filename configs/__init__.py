"""Job configs: each file has `get_config()`. In a checkout they lie in `configs/`."""
