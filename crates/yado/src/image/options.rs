//! `-o NAME=VALUE,...`: what a new image is like.

use crate::exit::with_code;
use crate::size::Size;
use anyhow::Result;
use image::format::qcow2::{Compression, CreateOptions, Preallocation};
use image::format::{Format, qed, vhd};

/// Bad usage.
pub const USAGE: u8 = 2;

/// What a new image is to be.
pub struct New {
    pub format: Format,
    /// Bytes of the disk.
    pub size: u64,
    pub preallocation: Preallocation,
    /// Name of the image to build on, and its format; empty if it was not said.
    pub backing: Option<(String, String)>,
    /// What only qcow2 images have.
    qcow2: CreateOptions,
    /// What only QED images have.
    qed: qed::CreateOptions,
    /// What only VHDs have.
    vhd: vhd::CreateOptions,
}

pub fn usage(text: impl Into<String>) -> anyhow::Error {
    with_code(USAGE, text)
}

/// A format by its name.
pub fn format(name: &str) -> Result<Format> {
    name.parse().map_err(usage)
}

fn switch(name: &str, value: &str) -> Result<bool> {
    match value {
        "on" | "yes" | "true" => Ok(true),
        "off" | "no" | "false" => Ok(false),
        other => Err(usage(format!("{name}={other}: on or off"))),
    }
}

fn log2(name: &str, number: u64) -> Result<u32> {
    if number.is_power_of_two() {
        Ok(number.trailing_zeros())
    } else {
        Err(usage(format!("{name}={number}: a power of two")))
    }
}

/// The options of a list; two commas are one of a value.
pub fn split(list: &str) -> Vec<String> {
    let mut options = vec![String::new()];
    let mut letters = list.chars().peekable();
    while let Some(letter) = letters.next() {
        match options.last_mut() {
            Some(option) if letter != ',' || letters.next_if_eq(&',').is_some() => option.push(letter),
            _ => options.push(String::new()),
        }
    }
    options.retain(|option| !option.is_empty());
    options
}

impl New {
    /// Reads the options of a format; the size is left open.
    pub fn parse(format: Format, lists: &[String]) -> Result<Self> {
        if !format.is_writable() {
            return Err(usage(format!(
                "{format} images are only read: choose another format, such as qcow2"
            )));
        }
        let mut new = Self {
            format,
            size: 0,
            preallocation: Preallocation::Off,
            backing: None,
            qcow2: CreateOptions::new(0),
            qed: qed::CreateOptions::new(0),
            vhd: vhd::CreateOptions::new(0),
        };
        for list in lists {
            for option in split(list) {
                let (name, value) = option.split_once('=').unwrap_or((&option, "on"));
                new.set(name, value)?;
            }
        }
        if let Some((_, format)) = new.backing.as_ref().filter(|(name, _)| name.is_empty()) {
            return Err(usage(format!("backing_fmt={format} without backing_file=")));
        }
        if new.qcow2.data_file.as_ref().is_some_and(|(name, _)| name.is_empty()) {
            return Err(usage("data_file_raw without data_file="));
        }
        Ok(new)
    }

    /// As qcow2's options.
    pub fn qcow2(&self) -> CreateOptions {
        CreateOptions {
            size: self.size,
            preallocation: self.preallocation,
            backing: self.backing.clone(),
            ..self.qcow2.clone()
        }
    }

    /// As QED's options.
    pub fn qed(&self) -> Result<qed::CreateOptions> {
        let backing = match &self.backing {
            Some((name, below)) => Some((name.clone(), format(below)?)),
            None => None,
        };
        Ok(qed::CreateOptions { size: self.size, backing, ..self.qed.clone() })
    }

    /// As VHD's options.
    pub fn vhd(&self) -> vhd::CreateOptions {
        vhd::CreateOptions { size: self.size, ..self.vhd.clone() }
    }

    fn set(&mut self, name: &str, value: &str) -> Result<()> {
        let (qcow2, qed, vhd) = (&mut self.qcow2, &mut self.qed, &mut self.vhd);
        let size = || value.parse::<Size>().map(|size| size.0).map_err(usage);
        match (self.format, name) {
            (_, "size") => self.size = size()?,
            (Format::Raw | Format::Qcow2, "preallocation") => {
                self.preallocation = match value {
                    "off" => Preallocation::Off,
                    "metadata" => Preallocation::Metadata,
                    "falloc" => Preallocation::Falloc,
                    "full" => Preallocation::Full,
                    other => {
                        return Err(usage(format!("preallocation={other}: off, metadata, falloc or full")));
                    }
                }
            }
            (Format::Qcow2 | Format::Qed | Format::Vhd, "backing_file") => {
                let format = self.backing.take().map(|(_, format)| format).unwrap_or_default();
                self.backing = Some((value.to_owned(), format));
            }
            (Format::Qcow2 | Format::Qed | Format::Vhd, "backing_fmt") => {
                let name = self.backing.take().map(|(name, _)| name).unwrap_or_default();
                self.backing = Some((name, value.to_owned()));
            }
            (Format::Vhd, "subformat") => {
                vhd.fixed = match value {
                    "fixed" => true,
                    "dynamic" => false,
                    other => return Err(usage(format!("subformat={other}: dynamic or fixed"))),
                }
            }
            (Format::Vhd, "block_size") => vhd.block_bits = log2(name, size()?)?,
            // Sizes are always exact.
            (Format::Vhd, "force_size") => drop(switch(name, value)?),
            (Format::Qed, "cluster_size") => qed.cluster_bits = log2(name, size()?)?,
            (Format::Qed, "table_size") => qed.table_clusters = size()?,
            (Format::Qcow2, "compat") => {
                qcow2.version = match value {
                    "0.10" | "v2" => 2,
                    "1.1" | "v3" => 3,
                    other => return Err(usage(format!("compat={other}: 0.10 or 1.1"))),
                }
            }
            (Format::Qcow2, "cluster_size") => qcow2.cluster_bits = log2(name, size()?)?,
            (Format::Qcow2, "refcount_bits") => qcow2.refcount_order = log2(name, size()?)?,
            (Format::Qcow2, "lazy_refcounts") => qcow2.lazy_refcounts = switch(name, value)?,
            (Format::Qcow2, "extended_l2") => qcow2.extended_l2 = switch(name, value)?,
            (Format::Qcow2, "compression_type") => {
                qcow2.compression = match value {
                    "zlib" => Compression::Zlib,
                    "zstd" => Compression::Zstd,
                    other => return Err(usage(format!("compression_type={other}: zlib or zstd"))),
                }
            }
            (Format::Qcow2, "data_file") => {
                let raw = qcow2.data_file.take().is_some_and(|(_, raw)| raw);
                qcow2.data_file = Some((value.to_owned(), raw));
            }
            (Format::Qcow2, "data_file_raw") => {
                let file = qcow2.data_file.take().map(|(name, _)| name).unwrap_or_default();
                qcow2.data_file = Some((file, switch("data_file_raw", value)?));
            }
            (format, other) => {
                return Err(usage(format!("{format} images have no option {other:?}\n{}", help(format))));
            }
        }
        Ok(())
    }
}

/// The options of a format, one a line.
pub fn help(format: Format) -> String {
    let options: &[(&str, &str)] = match format {
        Format::Raw => &[("size", "bytes of the disk"), ("preallocation", "off, falloc or full")],
        Format::Qcow2 => &[
            ("size", "bytes of the disk"),
            ("backing_file", "image to build on"),
            ("backing_fmt", "its format"),
            ("cluster_size", "512 to 2M (64K)"),
            ("compat", "0.10 (version 2) or 1.1 (version 3)"),
            ("compression_type", "zlib or zstd"),
            ("data_file", "another file for the data"),
            ("data_file_raw", "on: that file is a raw image"),
            ("extended_l2", "on: 32 subclusters in a cluster"),
            ("lazy_refcounts", "on: refcounts are written when the image is closed"),
            ("preallocation", "off, metadata, falloc or full"),
            ("refcount_bits", "1, 2, 4, 8, 16, 32 or 64 (16)"),
        ],
        Format::Qed => &[
            ("size", "bytes of the disk"),
            ("backing_file", "image to build on"),
            ("backing_fmt", "its format"),
            ("cluster_size", "4K to 64M (64K)"),
            ("table_size", "clusters of a table: 1 (QEMU does not open it), 2, 4, 8 or 16 (4)"),
        ],
        Format::Vhd => &[
            ("size", "bytes of the disk"),
            ("backing_file", "VHD to differ from"),
            ("backing_fmt", "vpc"),
            ("block_size", "4K to 1G (2M)"),
            ("subformat", "dynamic or fixed"),
        ],
        Format::Vhdx | Format::Vmdk => &[],
    };
    let lines: Vec<String> = options.iter().map(|(name, what)| format!("  {name:<18} {what}")).collect();
    format!("options of {format} images:\n{}", lines.join("\n"))
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn two_commas_are_one() {
        assert_eq!(split("a=1,,2,b,,"), ["a=1,2", "b,"]);
        assert!(split("").is_empty() && split(",").is_empty());
    }

    #[test]
    fn options_are_read_and_nonsense_refused() {
        let lists = ["cluster_size=128K,extended_l2=on".to_owned(), "compression_type=zstd".to_owned()];
        let new = New::parse(Format::Qcow2, &lists).unwrap();
        assert_eq!((new.qcow2.cluster_bits, new.qcow2.extended_l2), (17, true));
        assert_eq!(new.qcow2.compression, Compression::Zstd);
        for bad in ["cluster_size=3K", "colour=red", "compat=9", "backing_fmt=raw"] {
            assert!(New::parse(Format::Qcow2, &[bad.to_owned()]).is_err(), "{bad}");
        }
        assert!(New::parse(Format::Raw, &["cluster_size=64K".to_owned()]).is_err());
    }
}
