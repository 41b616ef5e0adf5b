"""The kinds of models: how each is loaded, fed, read and generated from."""
