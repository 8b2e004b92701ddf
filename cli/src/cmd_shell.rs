//! `pagefold completions` and `pagefold man`: made from the definition of the command line, so that they never tell of other
//! options than there are.

use std::io::Write;
use std::path::PathBuf;

use anyhow::Context;
use clap::{Args, CommandFactory};
use clap_complete::Shell;

use crate::args::Cli;
use crate::exit::Exit;

/// `pagefold completions SHELL`.
#[derive(Debug, Args)]
pub struct CompletionsArgs {
    /// For which shell; goes to standard output.
    shell: Shell,
}

/// `pagefold man [DIR]`.
#[derive(Debug, Args)]
pub struct ManArgs {
    /// Write a page for every command here (pagefold.1, pagefold-scan.1, ...); without it the page of pagefold itself goes to
    /// standard output.
    dir: Option<PathBuf>,
}

pub fn completions(args: &CompletionsArgs) -> anyhow::Result<Exit> {
    let mut text = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), "pagefold", &mut text);
    std::io::stdout().lock().write_all(&text).context(crate::format::UNWRITTEN)?;
    Ok(Exit::Done)
}

pub fn man(args: &ManArgs) -> anyhow::Result<Exit> {
    let command = Cli::command();
    match &args.dir {
        None => clap_mangen::Man::new(command)
            .render(&mut std::io::stdout().lock())
            .context(crate::format::UNWRITTEN)?,
        Some(dir) => {
            std::fs::create_dir_all(dir).with_context(|| format!("can't create {}", dir.display()))?;
            clap_mangen::generate_to(command, dir)
                .with_context(|| format!("can't write man pages to {}", dir.display()))?;
        }
    }
    Ok(Exit::Done)
}
