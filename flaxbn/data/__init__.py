"""Where samples come from: batches, the devices that they lie on, the processes that read them."""
