"""Pictures, reports and browser views of volumes and results, read in bounded memory."""
