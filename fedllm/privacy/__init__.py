"""Record-level differential privacy: clipping, noise, accounting, the site's policy and ledger."""
