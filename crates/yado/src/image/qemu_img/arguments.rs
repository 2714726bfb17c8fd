//! qemu-img's command line: its own letters, all of them that yado has a meaning for.

use clap::{Args, Parser, Subcommand};
use std::path::PathBuf;

/// Disk images, as qemu-img makes, shows, checks and copies them
#[derive(Debug, Parser)]
#[command(name = "qemu-img", disable_version_flag = true, infer_long_args = true, max_term_width = 110)]
#[command(args_override_self = true)]
pub struct Arguments {
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Measure how fast requests are served
    Bench(Bench),
    /// Add, change or remove a persistent dirty bitmap
    Bitmap(Bitmap),
    /// Look for damage, and repair it
    Check(Check),
    /// Write what an image holds into its backing file
    Commit(Commit),
    /// Compare the content of two images
    Compare(Compare),
    /// Copy an image into another format
    Convert(Convert),
    /// Make an image
    Create(Create),
    /// Show what an image is
    Info(Info),
    /// Show what is stored where
    Map(Map),
    /// Tell how large a new image's file would be
    Measure(Measure),
    /// Put an image over another backing file
    Rebase(Rebase),
    /// Change the size of an image's disk
    Resize(Resize),
    /// List, make, apply or delete internal snapshots
    Snapshot(Snapshot),
}

/// How an image is named and opened.
#[derive(Debug, Clone, Default, Args)]
pub struct Source {
    /// Format
    #[arg(short = 'f', value_name = "FORMAT")]
    pub format: Option<String>,
    /// FILE is a list of options: driver=FORMAT,file.filename=FILE
    #[arg(long)]
    pub image_opts: bool,
    /// Open though somebody may write the image
    #[arg(short = 'U', long)]
    pub force_share: bool,
}

#[derive(Debug, Args)]
pub struct Create {
    #[arg(short = 'f', value_name = "FORMAT", default_value = "raw")]
    pub format: String,
    #[arg(short = 'o', value_name = "OPTIONS")]
    pub options: Vec<String>,
    #[arg(short = 'b', value_name = "FILE")]
    pub backing: Option<String>,
    #[arg(short = 'F', value_name = "FORMAT")]
    pub backing_format: Option<String>,
    /// Do not open the backing file
    #[arg(short = 'u')]
    pub blind: bool,
    #[arg(short)]
    pub quiet: bool,
    pub file: Option<PathBuf>,
    pub size: Option<String>,
}

#[derive(Debug, Args)]
pub struct Info {
    #[command(flatten)]
    pub source: Source,
    #[arg(long, default_value = "human")]
    pub output: String,
    #[arg(long)]
    pub backing_chain: bool,
    pub file: PathBuf,
}

#[derive(Debug, Args)]
pub struct Check {
    #[command(flatten)]
    pub source: Source,
    #[arg(short, value_name = "leaks|all")]
    pub repair: Option<String>,
    #[arg(long, default_value = "human")]
    pub output: String,
    /// Cache mode
    #[arg(short = 'T', value_name = "CACHE")]
    pub cache: Option<String>,
    #[arg(short)]
    pub quiet: bool,
    pub file: PathBuf,
}

#[derive(Debug, Args)]
pub struct Map {
    #[command(flatten)]
    pub source: Source,
    #[arg(long, default_value = "human")]
    pub output: String,
    #[arg(short, long, value_name = "OFFSET")]
    pub start_offset: Option<String>,
    #[arg(short = 'l', long, value_name = "LEN")]
    pub max_length: Option<String>,
    pub file: PathBuf,
}

#[derive(Debug, Args)]
pub struct Compare {
    #[command(flatten)]
    pub source: Source,
    #[arg(short = 'F', value_name = "FORMAT")]
    pub second_format: Option<String>,
    #[arg(short = 'T', value_name = "CACHE")]
    pub cache: Option<String>,
    #[arg(short)]
    pub strict: bool,
    #[arg(short)]
    pub progress: bool,
    #[arg(short)]
    pub quiet: bool,
    pub first: PathBuf,
    pub second: PathBuf,
}

#[derive(Debug, Args)]
pub struct Convert {
    #[command(flatten)]
    pub source: Source,
    #[arg(short = 'O', value_name = "FORMAT", default_value = "raw")]
    pub target_format: String,
    #[arg(short = 'o', value_name = "OPTIONS")]
    pub options: Vec<String>,
    /// Build on this file, and copy only what differs from it
    #[arg(short = 'B', value_name = "FILE")]
    pub backing: Option<String>,
    #[arg(short = 'F', value_name = "FORMAT")]
    pub backing_format: Option<String>,
    #[arg(short = 'l', value_name = "SNAPSHOT")]
    pub snapshot: Option<String>,
    #[arg(short)]
    pub compress: bool,
    #[arg(short)]
    pub no_create: bool,
    #[arg(long)]
    pub target_is_zero: bool,
    #[arg(short = 'S', value_name = "SIZE", default_value = "4k")]
    pub sparse: String,
    #[arg(short = 't', value_name = "CACHE")]
    pub cache: Option<String>,
    #[arg(short = 'T', value_name = "CACHE")]
    pub source_cache: Option<String>,
    #[arg(short = 'm', value_name = "N")]
    pub threads: Option<usize>,
    /// Out of order (always so)
    #[arg(short = 'W')]
    pub out_of_order: bool,
    /// Let the file system copy, where it can share blocks (whole raw files always so)
    #[arg(short = 'C')]
    pub copy_range: bool,
    #[arg(short)]
    pub progress: bool,
    #[arg(short)]
    pub quiet: bool,
    /// Sources, and the target
    #[arg(required = true)]
    pub files: Vec<PathBuf>,
}

#[derive(Debug, Args)]
pub struct Resize {
    #[command(flatten)]
    pub source: Source,
    #[arg(long)]
    pub shrink: bool,
    #[arg(long, value_name = "MODE", default_value = "off")]
    pub preallocation: String,
    #[arg(short)]
    pub quiet: bool,
    pub file: PathBuf,
    #[arg(allow_hyphen_values = true)]
    pub size: String,
}

#[derive(Debug, Args)]
pub struct Snapshot {
    #[command(flatten)]
    pub source: Source,
    #[arg(short)]
    pub list: bool,
    #[arg(short, value_name = "NAME")]
    pub create: Option<String>,
    #[arg(short, value_name = "NAME")]
    pub apply: Option<String>,
    #[arg(short, value_name = "NAME")]
    pub delete: Option<String>,
    #[arg(short)]
    pub quiet: bool,
    pub file: PathBuf,
}

#[derive(Debug, Args)]
pub struct Measure {
    #[command(flatten)]
    pub source: Source,
    #[arg(short = 'O', value_name = "FORMAT", default_value = "raw")]
    pub target_format: String,
    #[arg(short = 'o', value_name = "OPTIONS")]
    pub options: Vec<String>,
    #[arg(short = 'l', value_name = "SNAPSHOT")]
    pub snapshot: Option<String>,
    #[arg(long)]
    pub size: Option<String>,
    #[arg(long, default_value = "human")]
    pub output: String,
    pub file: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub struct Rebase {
    #[command(flatten)]
    pub source: Source,
    #[arg(short = 'b', value_name = "FILE")]
    pub backing: Option<String>,
    #[arg(short = 'F', value_name = "FORMAT")]
    pub backing_format: Option<String>,
    #[arg(short = 'u')]
    pub blind: bool,
    #[arg(short = 't', value_name = "CACHE")]
    pub cache: Option<String>,
    #[arg(short = 'T', value_name = "CACHE")]
    pub source_cache: Option<String>,
    #[arg(short)]
    pub progress: bool,
    #[arg(short)]
    pub quiet: bool,
    pub file: PathBuf,
}

#[derive(Debug, Args)]
pub struct Commit {
    #[command(flatten)]
    pub source: Source,
    #[arg(short = 't', value_name = "CACHE")]
    pub cache: Option<String>,
    /// Leave the image as it is
    #[arg(short = 'd')]
    pub keep: bool,
    #[arg(short)]
    pub progress: bool,
    #[arg(short)]
    pub quiet: bool,
    pub file: PathBuf,
}

#[derive(Debug, Args)]
pub struct Bitmap {
    #[command(flatten)]
    pub source: Source,
    #[arg(long)]
    pub add: bool,
    #[arg(long)]
    pub remove: bool,
    #[arg(long)]
    pub clear: bool,
    #[arg(long)]
    pub enable: bool,
    #[arg(long)]
    pub disable: bool,
    /// Another bitmap, whose marks are added
    #[arg(long, value_name = "BITMAP")]
    pub merge: Vec<String>,
    /// The image that has it
    #[arg(short = 'b', value_name = "FILE")]
    pub source_file: Option<PathBuf>,
    #[arg(short = 'F', value_name = "FORMAT")]
    pub source_format: Option<String>,
    #[arg(short, value_name = "SIZE")]
    pub granularity: Option<String>,
    pub file: PathBuf,
    pub bitmap: String,
}

#[derive(Debug, Args)]
pub struct Bench {
    #[command(flatten)]
    pub source: Source,
    /// Requests in all
    #[arg(short, default_value_t = 75000)]
    pub count: u64,
    /// Requests at a time
    #[arg(short, default_value_t = 64)]
    pub depth: usize,
    #[arg(short, default_value = "0")]
    pub offset: String,
    #[arg(short = 's', value_name = "SIZE", default_value = "4k")]
    pub buffer_size: String,
    #[arg(short = 'S', value_name = "SIZE")]
    pub step_size: Option<String>,
    #[arg(short = 't', value_name = "CACHE")]
    pub cache: Option<String>,
    #[arg(short)]
    pub write: bool,
    /// Byte that is written
    #[arg(long, default_value_t = 0)]
    pub pattern: u8,
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub flush_interval: u64,
    #[arg(long)]
    pub no_drain: bool,
    /// threads, native or io_uring: how qemu-img talks to the host
    #[arg(short = 'i', value_name = "AIO")]
    pub aio: Option<String>,
    #[arg(short)]
    pub native: bool,
    #[arg(short)]
    pub quiet: bool,
    pub file: PathBuf,
}
