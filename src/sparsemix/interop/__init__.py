"""The edge to other libraries' models: reading, converting and writing them."""
