"""The Flower side of the library: records, client handlers, server loop."""
