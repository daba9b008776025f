"""Values: the layout of a layer's rows, and its state. Nothing here decides anything."""
