"""The layers: modules and parameters, dense and routed feed-forward layers, attention and its cache."""
