"""The embedded tasks, the training of their models, and the verifier that judges answers in processes of its own."""
