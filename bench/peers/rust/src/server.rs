//! The state of a server, read from its data directory.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};

/// The pid of the postmaster.
pub fn postmaster(data_dir: &Path) -> Result<u32> {
    let file = data_dir.join("postmaster.pid");
    let text = fs::read_to_string(&file).with_context(|| format!("{}", file.display()))?;
    let first = text.lines().next().context("an empty postmaster.pid")?;
    Ok(first.trim().parse()?)
}

/// Whether the server reports that it accepts connections.
pub fn is_ready(data_dir: &Path) -> bool {
    fs::read_to_string(data_dir.join("postmaster.pid")).is_ok_and(|text| {
        text.lines()
            .nth(7)
            .is_some_and(|line| line.trim() == "ready")
    })
}
