"""From scores and counts to the units and elements that stay."""
