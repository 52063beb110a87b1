"""An image and its instances, class pictures for prior preservation, and what each learning step draws."""
