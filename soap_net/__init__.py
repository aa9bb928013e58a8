"""SOAP-Net: the few-shot action recognition pipeline around SOAP (arXiv 2407.16344)."""
