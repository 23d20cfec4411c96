"""What a layer computes, and the layers that own its variables."""
