"""The engines behind quant.quantize(), one file each, loaded on first use."""
