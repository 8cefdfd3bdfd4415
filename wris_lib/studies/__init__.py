"""Questions put to the methods, and answered by measuring: ablations, choices of sizes, what a cache saves."""
