"""Images, wherever they lie -> batches of canvases in an order that is a function of (seed, epoch)."""
