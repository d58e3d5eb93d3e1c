"""What a build will do: records, verdicts, images and the shards to make of them."""
