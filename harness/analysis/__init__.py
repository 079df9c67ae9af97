"""What a decomposition would keep and lose, before anything is trained: spectra, input covariances, truncation."""
