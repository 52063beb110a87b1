"""Multi-concept image synthesis from single images, learned with MIFO."""
