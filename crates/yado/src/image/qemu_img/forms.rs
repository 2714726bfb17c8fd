//! The line that qemu-img prints of a new image: its options, with those that were not said as they are.

use super::super::options::split;
use crate::size::Size;
use image::format::Format;

/// How an option's value is written.
enum Kind {
    Text,
    Bytes,
    /// The size of the disk.
    Size,
}

/// Options in their order, with their defaults.
type Row = (&'static str, Kind, Option<&'static str>);

fn rows(format: Format) -> Vec<Row> {
    use Kind::{Bytes, Size, Text};
    match format {
        Format::Qcow2 => vec![
            ("cluster_size", Bytes, Some("65536")),
            ("extended_l2", Text, Some("off")),
            ("preallocation", Text, None),
            ("compression_type", Text, Some("zlib")),
            ("size", Size, None),
            ("compat", Text, None),
            ("backing_file", Text, None),
            ("backing_fmt", Text, None),
            ("data_file", Text, None),
            ("data_file_raw", Text, None),
            ("lazy_refcounts", Text, Some("off")),
            ("refcount_bits", Text, Some("16")),
        ],
        Format::Qed => vec![
            ("size", Size, None),
            ("backing_file", Text, None),
            ("backing_fmt", Text, None),
            ("cluster_size", Bytes, Some("65536")),
            ("table_size", Text, None),
        ],
        Format::Vhd => {
            vec![("size", Size, None), ("subformat", Text, None), ("force_size", Text, None)]
        }
        _ => vec![("size", Size, None), ("preallocation", Text, None)],
    }
}

/// The line for a new image.
pub fn formatting(file: &str, format: Format, options: &[String], size: u64) -> String {
    let said: Vec<String> = options.iter().flat_map(|list| split(list)).collect();
    let value = |name: &str| {
        let last = said.iter().rev().filter_map(|option| option.split_once('='));
        last.filter(|(said, _)| *said == name).map(|(_, value)| value.to_owned()).next()
    };
    let mut line = format!("Formatting '{file}', fmt={format}");
    for (name, kind, usual) in rows(format) {
        let written = match kind {
            Kind::Size => Some(size.to_string()),
            Kind::Text => value(name).or(usual.map(str::to_owned)),
            Kind::Bytes => {
                let bytes = |text: String| text.parse::<Size>().map_or(text, |size| size.0.to_string());
                value(name).map(bytes).or(usual.map(str::to_owned))
            }
        };
        if let Some(written) = written {
            line.push_str(&format!(" {name}={written}"));
        }
    }
    line
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn options_come_in_their_order_with_their_defaults() {
        let options = ["compat=v3,cluster_size=2M".to_owned(), "backing_file=a,backing_fmt=raw".to_owned()];
        assert_eq!(
            formatting("x", Format::Qcow2, &options, 512),
            "Formatting 'x', fmt=qcow2 cluster_size=2097152 extended_l2=off compression_type=zlib size=512 \
             compat=v3 backing_file=a backing_fmt=raw lazy_refcounts=off refcount_bits=16"
        );
        assert_eq!(formatting("y", Format::Raw, &[], 7), "Formatting 'y', fmt=raw size=7");
    }
}
