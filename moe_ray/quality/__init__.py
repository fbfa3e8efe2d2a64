"""How well a model predicts a text, and how far two models differ on it. In one process, without Ray."""
