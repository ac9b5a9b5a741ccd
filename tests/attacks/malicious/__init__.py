"""Files made to harm whoever reads them, and the readers that must refuse them."""
