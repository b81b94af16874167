"""Pictures, reports and browser views of volumes and results, by reads of bounded memory."""
