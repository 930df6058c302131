"""The embedded task and its model, and the verifier that judges answers in processes of its own."""
