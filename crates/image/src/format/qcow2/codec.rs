//! Clusters, deflated and inflated.

use super::header::Compression;
use super::noise::is_noise;
use std::io;

/// log2 of the deflate window that readers of the format may use.
const WINDOW_BITS: u8 = 12;
const ZLIB_LEVEL: u32 = 6;
const ZSTD_LEVEL: i32 = 3;

/// Inflates into a cluster. The input may be longer than what is used of it (its length is known in sectors only).
pub fn inflate(compression: Compression, from: &[u8], cluster: &mut [u8]) -> io::Result<()> {
    match compression {
        Compression::Zlib => inflate_zlib(from, cluster),
        Compression::Zstd => inflate_zstd(from, cluster),
    }
}

fn bad() -> io::Error {
    io::Error::new(
        io::ErrorKind::InvalidData,
        "a compressed cluster cannot be inflated: the image is damaged",
    )
}

fn inflate_zlib(from: &[u8], cluster: &mut [u8]) -> io::Result<()> {
    let mut inflater = flate2::Decompress::new(false);
    inflater.decompress(from, cluster, flate2::FlushDecompress::Finish).map_err(|_| bad())?;
    if inflater.total_out() == cluster.len() as u64 { Ok(()) } else { Err(bad()) }
}

/// There may be several frames in a row.
fn inflate_zstd(from: &[u8], cluster: &mut [u8]) -> io::Result<()> {
    let mut inflater = zstd::stream::raw::Decoder::new().map_err(|_| bad())?;
    let (mut used, mut done) = (0usize, 0usize);
    while done < cluster.len() {
        let input = from.get(used..).unwrap_or_default();
        let output = cluster.get_mut(done..).unwrap_or_default();
        let status =
            zstd::stream::raw::Operation::run_on_buffers(&mut inflater, input, output).map_err(|_| bad())?;
        if status.bytes_read == 0 && status.bytes_written == 0 {
            return Err(bad());
        }
        used = used.saturating_add(status.bytes_read);
        done = done.saturating_add(status.bytes_written);
    }
    Ok(())
}

/// Deflates clusters, one after another.
pub enum Deflater {
    Zlib(flate2::Compress),
    Zstd(zstd::bulk::Compressor<'static>),
}

impl Deflater {
    /// One for images compressed so.
    pub fn new(compression: Compression) -> io::Result<Self> {
        Ok(match compression {
            Compression::Zlib => {
                let level = flate2::Compression::new(ZLIB_LEVEL);
                Self::Zlib(flate2::Compress::new_with_window_bits(level, false, WINDOW_BITS))
            }
            Compression::Zstd => Self::Zstd(zstd::bulk::Compressor::new(ZSTD_LEVEL)?),
        })
    }

    /// The cluster deflated, if that makes it smaller.
    pub fn deflate(&mut self, cluster: &[u8]) -> Option<Vec<u8>> {
        // zstd looks for itself.
        let vain = matches!(self, Self::Zlib(_)) && is_noise(cluster);
        if vain { None } else { self.deflate_all(cluster) }
    }

    /// The same, tried whatever the cluster looks like.
    pub fn deflate_all(&mut self, cluster: &[u8]) -> Option<Vec<u8>> {
        let mut out = vec![0; cluster.len()];
        let len = match self {
            Self::Zlib(deflater) => {
                deflater.reset();
                let status = deflater.compress(cluster, &mut out, flate2::FlushCompress::Finish).ok()?;
                if status != flate2::Status::StreamEnd {
                    return None;
                }
                usize::try_from(deflater.total_out()).ok()?
            }
            Self::Zstd(deflater) => deflater.compress_to_buffer(cluster, &mut out).ok()?,
        };
        if len >= cluster.len() {
            return None;
        }
        out.truncate(len);
        Some(out)
    }
}

#[cfg(test)]
mod test {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn clusters_come_back(text in "[a-c]{1,200}", zstd: bool) {
            let cluster: Vec<u8> = text.bytes().cycle().take(65536).collect();
            let compression = if zstd { Compression::Zstd } else { Compression::Zlib };
            let mut deflated = Deflater::new(compression).unwrap().deflate(&cluster).unwrap();
            deflated.resize(deflated.len().next_multiple_of(512), 0);
            let mut back = vec![1; cluster.len()];
            inflate(compression, &deflated, &mut back).unwrap();
            prop_assert_eq!(back, cluster);
        }

        #[test]
        fn hostile_bytes_are_refused(bytes in prop::collection::vec(any::<u8>(), 0..600), zstd: bool) {
            let compression = if zstd { Compression::Zstd } else { Compression::Zlib };
            let _ = inflate(compression, &bytes, &mut [0; 4096]);
        }
    }

    #[test]
    fn what_does_not_shrink_is_not_deflated() {
        let noise: Vec<u8> = (0u32..4096).map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
        let noise: Vec<u8> = noise
            .iter()
            .scan(1u32, |x, b| {
                *x = x.wrapping_mul(1_664_525).wrapping_add(u32::from(*b) + 1_013_904_223);
                Some((*x >> 24) as u8)
            })
            .collect();
        assert_eq!(Deflater::new(Compression::Zlib).unwrap().deflate(&noise), None);
        assert_eq!(Deflater::new(Compression::Zstd).unwrap().deflate(&noise), None);
    }
}
