//! `yado cache`: downloads and images, and what of them may go.

use crate::arguments::{Cache, CacheCommand};
use crate::registry;
use crate::signals;
use crate::size::Size;
use debian::prune::{self, Policy, Pruned};
use std::path::PathBuf;
use std::sync::atomic::AtomicBool;

/// Where the Debian builder's cache is.
pub fn directory() -> anyhow::Result<PathBuf> {
    Ok(registry::cache_directory()?.join("debian"))
}

/// `yado cache`
pub fn cache(options: &Cache) -> anyhow::Result<()> {
    signals::install()?;
    match options.command {
        None => list(options.json),
        Some(CacheCommand::Prune { all }) => {
            let policy = if all { Policy::everything() } else { Policy::automatic() };
            let Pruned { images, downloads, bytes } = remove(policy, &signals::CANCELLED)?;
            println!("removed {images} images and {downloads} downloads, {}", Size(bytes));
            Ok(())
        }
    }
}

/// Removes what `policy` says and no guest needs. Waits for another yado that builds, unless `stop` is set.
pub fn remove(mut policy: Policy, stop: &AtomicBool) -> anyhow::Result<Pruned> {
    for guest in registry::list()? {
        // Guests kept by an earlier yado boot the image's own kernel.
        policy.keep.extend(guest.record.boot.map(|boot| boot.kernel));
    }
    Ok(prune::prune(&directory()?, &policy, stop)?)
}

fn list(json: bool) -> anyhow::Result<()> {
    let survey = prune::survey(&directory()?);
    if json {
        println!("{}", serde_json::to_string_pretty(&survey)?);
        return Ok(());
    }
    println!("{:12}  {:14}  {:>8}  {:>10}  {:10}  USED", "IMAGE", "RELEASE", "PACKAGES", "SIZE", "STATE");
    for image in &survey.images {
        println!(
            "{:12}  {:14}  {:>8}  {:>10}  {:10}  {}",
            image.key.get(..12).unwrap_or(&image.key),
            image.release,
            image.packages,
            Size(image.bytes).to_string(),
            if image.current { "current" } else { "superseded" },
            crate::guests::ago(image.used)
        );
    }
    println!(
        "{} images and {} downloads ({}): {} in {}",
        survey.images.len(),
        survey.downloads,
        Size(survey.download_bytes),
        Size(survey.bytes()),
        directory()?.display()
    );
    Ok(())
}
