"""Orders: takes orders over HTTP, and follows what the others say about them."""
